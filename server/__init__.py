"""The running service: HTTP side (api, gateway, data, tenancy, store, cli) and device side (engine, training)."""
