"""What each worker really costs: measured, rolled up, and given to whoever has to place work."""
