"""How the embedded models were made: speech, training, evaluation. Not in the wheel."""
