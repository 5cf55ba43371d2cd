"""Answers for people: one picture or clip and a question."""
