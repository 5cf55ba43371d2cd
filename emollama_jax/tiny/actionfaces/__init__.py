"""`actionfaces`: faces drawn from action units, a stand-in where real sets may not be shipped."""
