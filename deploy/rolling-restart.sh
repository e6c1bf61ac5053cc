#!/bin/sh
# Restart the containers of services one after the other, each healthy again before the next; callers notice nothing.
# One that is not healthy within HEALTHY_S seconds (180) ends this with status 1: the others have not been touched.
#
#   deploy/rolling-restart.sh api worker-gpu
set -eu
cd "$(dirname "$0")/.."
for service in "$@"; do
    containers="$(docker compose ps --quiet "$service")"
    test -n "$containers" || { echo "$service: no container is running" >&2; exit 1; }
    for container in $containers; do
        docker restart -t 75 "$container" >/dev/null
        end=$(($(date +%s) + ${HEALTHY_S:-180}))
        until test "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy; do
            if test "$(date +%s)" -ge "$end"; then
                echo "$service: $container is not healthy; what it said last:" >&2
                docker logs --tail 20 "$container" >&2
                exit 1
            fi
            sleep 1
        done
        echo "$service: $container is back"
    done
done
