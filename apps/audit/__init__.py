"""`kvshare audit`: does reuse change the answers to a user's own requests?"""
