"""How the embedded models were made: drawings, dialogues, speech, training, evaluation."""
