"""The registry proxy: an OCI distribution pull-through for engines without the plugin."""
