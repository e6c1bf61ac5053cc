"""What a host lets this process use, and how this process behaves there. The standard library alone."""
