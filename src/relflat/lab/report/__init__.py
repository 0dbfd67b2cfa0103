"""What a comparison prints, draws and writes."""
