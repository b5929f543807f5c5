"""Tables that set published claims beside what is measured here."""
