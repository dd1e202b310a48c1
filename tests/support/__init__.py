"""Small models and instruments for the tests."""
