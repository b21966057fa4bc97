"""The dose: how much of a method's change is kept, seen on non-members that no loss and no audit sees."""
