"""What a forward pass left: layers, their calls, the graph."""
