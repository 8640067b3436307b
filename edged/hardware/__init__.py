"""What the device is, and how much of it a worker may use."""
