"""Chat templates of widely used model families, written for the tests with the habits of the originals."""

# ruff: noqa: E501
from __future__ import annotations

# turns of user and assistant alternate; one at the start may be the system's, which goes into the first user turn
LLAMA_2 = """
{%- set first = messages[0] if messages[0]['role'] == 'system' else none -%}
{%- set turns = messages[1:] if first else messages -%}
{%- for m in turns -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate: user, assistant, user, assistant') }}
{%- endif -%}
{%- set text = m['content'] -%}
{%- if loop.first and first -%}{%- set text = '<<SYS>>\\n' + first['content'] + '\\n<</SYS>>\\n\\n' + text -%}{%- endif -%}
{%- if m['role'] == 'user' -%}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- elif m['role'] == 'assistant' -%}{{ ' ' + text.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

# every role has a header, contents are trimmed
LLAMA_3 = """
{%- for m in messages -%}
{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{{- m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

# a system turn with dates is always written; tools stand in the first user turn, one call a turn, no text beside it
LLAMA_3_1 = """
{{- bos_token -}}
{%- if tools_in_user_message is not defined -%}{%- set tools_in_user_message = true -%}{%- endif -%}
{%- if date_string is not defined -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] | trim -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none and tools is defined -%}{{ 'Environment: ipython\\n' }}{%- endif -%}
{{ 'Knowledge until December 2023\\nToday: ' + date_string + '\\n\\n' }}
{%- if tools and not tools_in_user_message -%}
{{ 'You may call functions:\\n' }}{%- for t in tools -%}{{ t | tojson(indent=4) + '\\n\\n' }}{%- endfor -%}
{%- endif -%}
{{ system + '<|eot_id|>' }}
{%- if tools and tools_in_user_message -%}
{%- if turns | length == 0 -%}{{ raise_exception('Cannot put tools in the first user message without one!') }}{%- endif -%}
{%- set asked = turns[0]['content'] | trim -%}{%- set turns = turns[1:] -%}
{{ '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a function call in JSON.\\n\\n' }}
{%- for t in tools -%}{{ t | tojson(indent=4) + '\\n\\n' }}{%- endfor -%}
{{ asked + '<|eot_id|>' }}
{%- endif -%}
{%- for m in turns -%}
{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) -%}
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in m -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('This model only supports single tool-calls at once!') }}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' -}}
{%- else -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if m.content is mapping or (m.content is iterable and m.content is not string) -%}{{ m.content | tojson }}
{%- else -%}{{ m.content }}{%- endif -%}
{{ '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

# Mistral and Mixtral at first: no system turn, strict alternation
MISTRAL_1 = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if m['role'] == 'user' -%}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' -%}{{ m['content'] + eos_token }}
{%- else -%}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif -%}
{%- endfor -%}
"""

# with tools: system text and tools stand before the last user turn; ids of calls have nine characters
MISTRAL_3 = """
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set turns = messages -%}{%- endif -%}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list -%}
{%- set ns = namespace(index=0) -%}
{%- for m in turns -%}
{%- if not (m.role == 'tool' or m.role == 'tool_results' or m.tool_calls) -%}
{%- if (m['role'] == 'user') != (ns.index % 2 == 0) -%}
{{ raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set ns.index = ns.index + 1 -%}
{%- endif -%}
{%- endfor -%}
{{ bos_token }}
{%- for m in turns -%}
{%- if m['role'] == 'user' -%}
{%- if tools and m == asked[-1] -%}
{{ '[AVAILABLE_TOOLS] [' }}{%- for t in tools -%}{{ t | tojson }}{{ ', ' if not loop.last }}{%- endfor -%}{{ '][/AVAILABLE_TOOLS]' }}
{%- endif -%}
{%- if loop.last and system is defined -%}{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
{%- else -%}{{ '[INST] ' + m['content'] + '[/INST]' }}{%- endif -%}
{%- elif m.tool_calls is defined and m.tool_calls -%}
{{ '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls -%}
{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{%- if c.id is not defined or c.id | length != 9 -%}
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif -%}
{{ ', "id": "' + c.id + '"}' }}{{ ', ' if not loop.last else ']' + eos_token }}
{%- endfor -%}
{%- elif m['role'] == 'assistant' -%}{{ ' ' + m['content'] | trim + eos_token }}
{%- elif m['role'] in ('tool_results', 'tool') -%}
{%- set content = m.content.content if m.content is mapping and m.content.content is defined else m.content -%}
{{ '[TOOL_RESULTS] {"content": ' + content | string + ', ' }}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 -%}
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif -%}
{{ '"call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else -%}{{ raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') }}
{%- endif -%}
{%- endfor -%}
"""

# no system turn; the assistant is called model, contents are trimmed
GEMMA_2 = """
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# a system turn at the start goes into the first user turn; contents are text or parts
GEMMA_3 = """
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\\n\\n' -%}
{%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
{%- set turns = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for m in turns -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
{%- if m['content'] is string -%}{{ m['content'] | trim }}
{%- elif m['content'] is iterable -%}
{%- for part in m['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
{%- endfor -%}
{%- else -%}{{ raise_exception('Invalid content type') }}
{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# a system text of its own where none is given; answers of tools are a user turn
QWEN_2_5 = """
{%- set given = messages[0]['role'] == 'system' -%}
{%- set own = messages[0]['content'] if given else 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{{ '<|im_start|>system\\n' + own }}
{%- if tools -%}
{{ '\\n\\n# Tools\\n\\n<tools>' }}{%- for t in tools -%}{{ '\\n' + t | tojson }}{%- endfor -%}{{ '\\n</tools>\\n\\nAnswer in <tool_call></tool_call>.' }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>' + m.role }}
{%- if m.content -%}{{ '\\n' + m.content }}{%- endif -%}
{%- for c in m.tool_calls -%}
{%- set c = c.function if c.function is defined else c -%}
{{ '\\n<tool_call>\\n{"name": "' + c.name + '", "arguments": ' + c.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# thoughts are kept after the last question of the user only, which is not an answer of a tool
QWEN_3 = """
{%- if tools -%}
{{ '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '# Tools\\n<tools>' }}
{%- for t in tools -%}{{ '\\n' + t | tojson }}{%- endfor -%}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' -%}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif -%}
{%- set ns = namespace(seeking=true, last=messages | length - 1) -%}
{%- for m in messages[::-1] -%}
{%- set index = messages | length - 1 - loop.index0 -%}
{%- if ns.seeking and m.role == 'user' and m.content is string and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}
{%- set ns.seeking = false -%}{%- set ns.last = index -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content if m.content is string else '' -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{%- set thoughts = '' -%}
{%- if m.reasoning_content is string -%}{%- set thoughts = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thoughts) -%}
{{ '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else -%}{{ content }}{%- endif -%}
{%- for c in m.tool_calls or [] -%}
{%- if (loop.first and content) or not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- set c = c.function if c.function else c -%}
{{ '<tool_call>\\n{"name": "' + c.name + '", "arguments": ' }}
{%- if c.arguments is string -%}{{ c.arguments }}{%- else -%}{{ c.arguments | tojson }}{%- endif -%}{{ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""

# other roles than these three are passed over in silence
PHI_3 = """
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{ '<|system|>\\n' + m['content'] + '<|end|>\\n' }}
{%- elif m['role'] == 'user' -%}{{ '<|user|>\\n' + m['content'] + '<|end|>\\n' }}
{%- elif m['role'] == 'assistant' -%}{{ '<|assistant|>\\n' + m['content'] + '<|end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}
"""

PHI_4 = """
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{ '<|im_start|>system<|im_sep|>' + m['content'] + '<|im_end|>' }}
{%- elif m['role'] == 'user' -%}{{ '<|im_start|>user<|im_sep|>' + m['content'] + '<|im_end|>' }}
{%- elif m['role'] == 'assistant' -%}{{ '<|im_start|>assistant<|im_sep|>' + m['content'] + '<|im_end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}
"""

# ChatML as SmolLM2 has it: any role, and a system text of its own
CHATML = """
{%- for m in messages -%}
{%- if loop.first and m['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# all system turns are moved to the start; thoughts of answers are dropped; other roles are passed over in silence
DEEPSEEK = """
{%- set ns = namespace(system='', tool=false, first=true) -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}
{%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + m['content'] -%}{%- set ns.first = false -%}
{%- endif -%}
{%- endfor -%}
{{ bos_token + ns.system }}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{%- set ns.tool = false -%}{{ '<|User|>' + m['content'] }}
{%- elif m['role'] == 'assistant' and m['tool_calls'] -%}
{{ '<|Assistant|>' + (m['content'] or '') + '<|calls_begin|>' }}
{%- for c in m['tool_calls'] -%}
{{ '<|call_begin|>' + c['type'] + '<|sep|>' + c['function']['name'] + '\\n```json\\n' + c['function']['arguments'] | string + '\\n```<|call_end|>' }}
{%- endfor -%}
{{ '<|calls_end|>' + eos_token }}
{%- elif m['role'] == 'assistant' -%}
{%- set content = m['content'].split('</think>')[-1] if '</think>' in m['content'] else m['content'] -%}
{{ ('' if ns.tool else '<|Assistant|>') + content + eos_token }}{%- set ns.tool = false -%}
{%- elif m['role'] == 'tool' -%}
{{ ('' if ns.tool else '<|outputs_begin|>') + '<|output_begin|>' + m['content'] + '<|output_end|>' }}{%- set ns.tool = true -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.tool -%}{{ '<|Assistant|><think>\\n' }}{%- endif -%}
"""

ZEPHYR = """
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{ '<|user|>\\n' + m['content'] + eos_token + '\\n' }}
{%- elif m['role'] == 'system' -%}{{ '<|system|>\\n' + m['content'] + eos_token + '\\n' }}
{%- elif m['role'] == 'assistant' -%}{{ '<|assistant|>\\n' + m['content'] + eos_token + '\\n' }}
{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
{%- endfor -%}
"""

# a preamble of its own or the system's; strict alternation, contents trimmed
COHERE = """
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = 'You are Command, an assistant.' -%}{%- set turns = messages -%}{%- endif -%}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}
{%- for m in turns -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if m['role'] == 'user' -%}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- elif m['role'] == 'assistant' -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}
"""

# GPT-OSS: a system turn of its own with a date, a first system or developer turn as instructions, channels of answers,
# thoughts beside a call or the last answer only, and answers of the tool that was called last
HARMONY = """
{{- '<|start|>system<|message|>You are ChatGPT.\\nKnowledge cutoff: 2024-06\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' -}}
{%- if messages[0].role in ('developer', 'system') -%}
{%- set instructions = messages[0].content -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set instructions = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- if instructions or tools -%}
{{ '<|start|>developer<|message|>' }}
{%- if instructions -%}{{ '# Instructions\\n\\n' + instructions }}{%- endif -%}
{%- if tools -%}{{ '# Tools\\n\\n' }}{%- for t in tools -%}{{ 'type ' + t.function.name + ' = ' + t.function | tojson + ';\\n' }}{%- endfor -%}{%- endif -%}
{{ '<|end|>' }}
{%- endif -%}
{%- set last = namespace(call=none) -%}
{%- for m in turns -%}
{%- if m.role == 'assistant' -%}
{%- if 'content' in m and ('<|channel|>analysis<|message|>' in m.content or '<|channel|>final<|message|>' in m.content) -%}
{{ raise_exception('You have passed a message containing <|channel|> tags in the content field.') }}
{%- endif -%}
{%- if 'tool_calls' in m -%}
{%- set call = m.tool_calls[0].function if m.tool_calls[0].function else m.tool_calls[0] -%}
{%- if m.content and m.thinking -%}{{ raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}
{%- elif m.content -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' }}
{%- elif m.thinking -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif -%}
{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + call.arguments | tojson + '<|call|>' }}
{%- set last.call = call.name -%}
{%- elif loop.last and not add_generation_prompt -%}
{%- if m.thinking -%}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else -%}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- set last.call = none -%}
{%- endif -%}
{%- elif m.role == 'tool' -%}
{%- if last.call is none -%}{{ raise_exception('Message has tool role, but there was no previous assistant message with a tool call!') }}{%- endif -%}
{{ '<|start|>functions.' + last.call + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
{%- elif m.role == 'user' -%}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "llama 3.1": LLAMA_3_1,
    "mistral 0.1, mixtral": MISTRAL_1,
    "mistral 0.3, tools": MISTRAL_3,
    "gemma 2": GEMMA_2,
    "gemma 3": GEMMA_3,
    "qwen 2.5": QWEN_2_5,
    "qwen 3": QWEN_3,
    "phi 3": PHI_3,
    "phi 4": PHI_4,
    "chatml, smollm2": CHATML,
    "deepseek": DEEPSEEK,
    "zephyr": ZEPHYR,
    "cohere": COHERE,
    "gpt-oss, harmony": HARMONY,
}
