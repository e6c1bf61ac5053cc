"""Where jobs wait: the contract, in memory and on Redis."""
