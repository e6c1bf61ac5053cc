"""What a host lets this process use of its processors, and how its threads wait there. The standard library alone."""
