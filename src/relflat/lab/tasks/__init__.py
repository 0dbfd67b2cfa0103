"""What can be trained: data, model, loss, metric."""
