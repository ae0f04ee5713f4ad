"""Who is asking: keys, and the tenants that they belong to."""
