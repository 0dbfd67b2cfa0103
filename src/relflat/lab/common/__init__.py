"""What all rooms of the lab use: answers to wrong names, numbers fit for JSON."""
