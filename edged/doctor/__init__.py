"""``edged doctor``: what on this device keeps edged from working well, each with its fix."""
