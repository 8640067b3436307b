"""The doors: MQTT and HTTP, and the models they share."""
