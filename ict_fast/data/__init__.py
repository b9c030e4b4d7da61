"""Images: the store, what is prepared into it, which image comes when, and how it reaches the device."""
