"""What a practitioner asks of the result: does it still refuse, and what did it lose?"""
