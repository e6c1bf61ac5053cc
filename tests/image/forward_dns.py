"""Docker's resolver, 127.0.0.11 in every container, in front of the one that podman's networks have at their gateway.

Usage, within a container's network: forward_dns.py GATEWAY. Says `ready` once it listens; ends when it is killed.
"""

from __future__ import annotations

import contextlib
import socket
import sys

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
    listening.bind(("127.0.0.11", 53))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        query, sender = listening.recvfrom(4096)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
            asking.settimeout(2.0)
            asking.sendto(query, (sys.argv[1], 53))
            listening.sendto(asking.recv(4096), sender)
