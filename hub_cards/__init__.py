"""Model cards and export to the Hub."""
