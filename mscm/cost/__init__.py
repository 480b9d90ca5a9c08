"""What a step costs (level 4): operations, memory traffic, messages, and the least time that a chip needs for them."""
