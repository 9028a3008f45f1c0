"""Every conformance check on every callback and on other tools."""
