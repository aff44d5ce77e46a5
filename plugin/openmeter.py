"""What `kong-python-pluginserver -d` finds: the plugin `openmeter`, named like this file.

It takes every .py file in its directory for a plugin, so this one is alone here.
"""

from openmeter_plugin.kong.kong_pdk import Plugin, Schema, priority, version

__all__ = ["Plugin", "Schema", "priority", "version"]
