"""What the commands of the chat screen do; each module registers its own."""
