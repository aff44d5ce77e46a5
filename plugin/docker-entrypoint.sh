#!/bin/sh
# Puts what Kong needs into the folder that is shared with it, then serves there. With a command of
# openmeter-plugin as first argument it runs that instead: `files DIR` in an init container, `spool drain` in a Job.
# A stock Kong image has no Python: its query command is `cat /run/openmeter/info.json`. A distroless one has no
# cat either: its query command runs LuaJIT on /run/openmeter/info.lua.
set -eu
umask 027
run=${OPENMETER_PLUGIN_RUN:-/run/openmeter}
unset OPENMETER_PLUGIN_RUN # openmeter-plugin would warn of a variable that it does not know
case "${1:--}" in
-*) ;;
*) exec openmeter-plugin "$@" ;;
esac
openmeter-plugin files "$run" >/dev/null
exec openmeter-plugin serve --socket "$run/openmeter.socket" "$@"
