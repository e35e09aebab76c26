"""`deca doctor`: what is wrong with the hosts, before a job is started on them.

On every host runs an agent (agent.py, sights.py, links.py), made of the standard library alone, sent over ssh and gone
with the connection. hosts.py and survey.py ask all agents at once; the rules look at the answers and make findings;
table.py shows them.
"""
