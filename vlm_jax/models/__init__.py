"""Model families, composed from towers."""
