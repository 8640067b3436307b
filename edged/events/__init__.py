"""From an accepted event to exactly one published outcome."""
