"""The demo: invented species, their calls, a small model that hears them, and the commands run on it."""
