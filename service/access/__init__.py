"""Who may call, and how often, and how much at once."""
