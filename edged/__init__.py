"""edged answers a sensor's questions on the device, from the device's own documents, with its own model."""

__version__ = "0.1.0"
