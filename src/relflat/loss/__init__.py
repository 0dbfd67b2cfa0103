"""What is known of the loss."""
