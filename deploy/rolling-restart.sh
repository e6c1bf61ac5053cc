#!/bin/sh
# Restart the containers of services one after the other, each healthy again before the next; callers notice nothing.
#
#   deploy/rolling-restart.sh api worker-gpu
set -eu
cd "$(dirname "$0")/.."
for service in "$@"; do
    for container in $(docker compose ps --quiet "$service"); do
        docker restart --timeout 75 "$container" >/dev/null
        until test "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy; do sleep 1; done
        echo "$service: $container is back"
    done
done
