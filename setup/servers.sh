#!/bin/sh
# Installs the servers that tests and benchmarks start for themselves: Redis. Does nothing where it
# is there. They are only installed, never left running as a service.
set -eu

if command -v redis-server >/dev/null 2>&1; then
  echo "servers: $(redis-server --version | cut -d' ' -f1-3), already installed"
  exit 0
fi

# Outside CI nobody is made root without having asked for it.
as_root=
if [ "$(id -u)" -ne 0 ]; then
  as_root=none
  if [ -n "${CI:-}" ] && sudo -n true 2>/dev/null; then as_root="sudo -n"; fi
fi
if ! command -v apt-get >/dev/null 2>&1 || [ "$as_root" = none ]; then
  echo "servers: redis-server is not installed, and this is not root on Debian or Ubuntu: install it" \
    "by your system's means (for instance: sudo apt-get install redis-server). Without it, what" \
    "needs Redis is skipped."
  exit 0
fi

echo "servers: installing redis-server with apt-get"
# Debian starts a service after installing it, unless this says no.
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
  $as_root chmod +x "$policy"
  made=1
fi
trap '[ -z "$made" ] || $as_root rm -f "$policy"' EXIT
$as_root apt-get update -qq
$as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends redis-server >/dev/null
echo "servers: $(redis-server --version | cut -d' ' -f1-3) installed"
