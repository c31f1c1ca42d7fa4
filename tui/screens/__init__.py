"""The app's screens. They are imported when they are opened: the start must not wait for them."""
