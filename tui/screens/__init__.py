"""The app's screens. Each module registers the command that opens its screen."""
