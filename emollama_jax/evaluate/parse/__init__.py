"""From an answer's text to the class that it names."""
