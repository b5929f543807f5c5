"""Tables that compare published claims with measured values."""
