"""What a purification publishes: manifest, card, tables, the push to the Hub."""
