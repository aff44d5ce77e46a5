#!/bin/sh
# Puts what Kong's query command prints into the folder that is shared with Kong, then serves there.
# A stock Kong image has no Python: its query command is `cat /run/openmeter/info.json`. A distroless one has no
# cat either: its query command runs LuaJIT on /run/openmeter/info.lua.
set -eu
umask 027
openmeter-plugin info >"$OPENMETER_PLUGIN_RUN/.info.json"
mv "$OPENMETER_PLUGIN_RUN/.info.json" "$OPENMETER_PLUGIN_RUN/info.json"
openmeter-plugin info --lua >"$OPENMETER_PLUGIN_RUN/.info.lua"
mv "$OPENMETER_PLUGIN_RUN/.info.lua" "$OPENMETER_PLUGIN_RUN/info.lua"
exec openmeter-plugin serve --socket "$OPENMETER_PLUGIN_RUN/openmeter.socket" "$@"
