"""What runs forward, backward and the update: one protocol, and the engines that keep it."""
