"""Instruction data: category items and Gemini's conversations (`emollama data instruct`)."""
