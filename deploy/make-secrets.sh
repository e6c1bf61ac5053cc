#!/bin/sh
# Passwords and a self-signed certificate in deploy/secrets, for docker-compose.yml. What is there already is kept, so
# a certificate of a real authority is put in place as tls_cert.pem and tls_key.pem.
#
#   deploy/make-secrets.sh [HOST...]        names of this host for the certificate, beside localhost
set -eu
folder="$(dirname "$0")/secrets"
mkdir -p "$folder"
chmod 700 "$folder" # the files below are readable to the containers' users, and so to nobody but through here
cd "$folder"
umask 022

new() { openssl rand -hex 32; }

if ! test -e redis_auth; then
    password="$(new)"
    printf 'requirepass %s\n' "$password" > redis_auth
    printf 'redis://:%s@redis:6379/0\n' "$password" > queue_url
    printf '{"redis://redis:6379": "%s"}\n' "$password" > redis_exporter.json
fi
test -e grafana_password || new > grafana_password
if ! test -e tls_key.pem; then
    names="DNS:localhost,IP:127.0.0.1"
    for host in "$@"; do names="$names,DNS:$host"; done
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "/CN=recofuse" \
        -addext "subjectAltName=$names" -keyout tls_key.pem -out tls_cert.pem 2>/dev/null
    chmod 644 tls_key.pem
fi
echo "secrets are in $folder"
test -e alert_webhook || echo "alerts reach nobody until $folder/alert_webhook says where (docs/operations.md)"
