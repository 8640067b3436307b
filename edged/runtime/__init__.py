"""What every long-lived part of the daemon needs: owned tasks, named conditions, counters."""
