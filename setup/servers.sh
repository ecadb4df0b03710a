#!/bin/sh
# Installs the programs that tests and benchmarks start for themselves: the servers Redis and
# PostgreSQL, and wrk, which sends requests. Does nothing where they are there. They are only
# installed, never left running as a service.
set -eu

# Debian keeps PostgreSQL's server out of the path.
has_postgres() {
  command -v initdb >/dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1
}

missing=
command -v redis-server >/dev/null 2>&1 || missing="redis-server"
has_postgres || missing="$missing postgresql"
command -v wrk >/dev/null 2>&1 || missing="$missing wrk"
if [ -z "$missing" ]; then
  echo "servers: redis-server, postgresql and wrk, already installed"
  exit 0
fi

# Outside CI nobody is made root without having asked for it.
as_root=
if [ "$(id -u)" -ne 0 ]; then
  as_root=none
  if [ -n "${CI:-}" ] && sudo -n true 2>/dev/null; then as_root="sudo -n"; fi
fi
if ! command -v apt-get >/dev/null 2>&1 || [ "$as_root" = none ]; then
  echo "servers: not installed:" $missing"; this is not root on Debian or Ubuntu: install them by" \
    "your system's means (for instance: sudo apt-get install" $missing"). Without them, what needs" \
    "them is skipped."
  exit 0
fi

echo "servers: installing" $missing "with apt-get"
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
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends $missing >/dev/null
echo "servers: installed" $missing
