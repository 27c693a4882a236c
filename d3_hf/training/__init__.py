"""The trainer that every defence extends, and what it is made of."""
