// A conversation: its turns, what of them is sent, and its file, which has the format of Python's `Conversation.save`.
//
// A turn has a `question` and the answer's `text`, `finish_reason` and `error`; after the answer also its `usage`, and
// the seconds to its first token (`first`) and to its last one (`seconds`). `finish_reason` is null while it runs.

export const ENDINGS = {stop: "complete", length: "cut off at max_tokens", cancelled: "stopped", error: "failed"};

const MAX_FILE = 8 * 2 ** 20; // bytes: what the gateway accepts as a request

export const newConversation = ({system = "", settings = {}} = {}) => ({
    id: Date.now().toString(36) + Math.random().toString(36).slice(2),
    system,
    settings: {...settings},
    turns: [],
    changed: 0,
});

export const newTurn = question => ({question, text: "", finish_reason: null, error: null});

export const titleOf = ({turns}) => turns[0]?.question.trim().slice(0, 60) || "New conversation";

// Return the request for the answer to `question` after `turns`. Turns without an answer are left out.
export const requestOf = ({system, settings}, turns, question) => ({
    ...settings,
    messages: [...messagesOf(system, turns.filter(({text}) => text)), {role: "user", content: question}],
});

// Return what `Conversation.save` writes for this conversation.
export const toFile = ({system, turns}) => {
    const answers = turns.map(({finish_reason, error}) => ({finish_reason: finish_reason ?? "cancelled", error}));
    return JSON.stringify({messages: messagesOf(system, turns), answers}, null, 2) + "\n";
};

// Return the conversation in a file, with the settings of another one. Throw an Error whose message is a sentence.
export const fromFile = async (file, {settings}) => {
    if (file.size > MAX_FILE) {
        throw new Error(`${file.name} has more than ${MAX_FILE / 2 ** 20} MiB. Choose a smaller file.`);
    }
    let saved;
    try {
        saved = JSON.parse(await file.text());
    } catch {
        throw new Error(`${file.name} is not a JSON file. Choose a saved conversation.`);
    }
    const messages = Array.isArray(saved) ? saved : saved?.messages;
    const problem = problemOf(messages);
    if (problem) throw new Error(`${file.name} does not hold a conversation: ${problem} Choose another file.`);
    const system = messages[0]?.role === "system" ? messages.shift().content : "";
    return {...newConversation({system, settings}), turns: turnsOf(messages, saved.answers)};
};

// Return a sentence about the answer's length, speed and end, or "" if there is nothing to say.
export const summaryOf = ({finish_reason, usage, first, seconds}) => {
    const tokens = usage?.completion_tokens, parts = [];
    if (tokens) parts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
    if (first !== undefined) parts.push(`first after ${first.toFixed(2)} s`);
    if (tokens > 1 && seconds > first) parts.push(`${((tokens - 1) / (seconds - first)).toFixed(1)} tokens/s`);
    if (finish_reason && finish_reason !== "stop") parts.push(ENDINGS[finish_reason] ?? finish_reason);
    if (usage?.dropped_turns) {
        const turns = usage.dropped_turns === 1 ? "turn" : `${usage.dropped_turns} turns`;
        parts.push(`without the oldest ${turns}, which did not fit the context window`);
    }
    return parts.join(", ");
};

const messagesOf = (system, turns) => [
    ...(system.trim() ? [{role: "system", content: system}] : []),
    ...turns.flatMap(({question, text}) => [
        {role: "user", content: question},
        {role: "assistant", content: text},
    ]),
];

// Return a sentence about the first message that is wrong, or "".
const problemOf = messages => {
    if (!Array.isArray(messages)) return "It has no list of messages.";
    const firstUser = messages[0]?.role === "system" ? 1 : 0;
    for (const [index, message] of messages.entries()) {
        const role = index < firstUser ? "system" : ["user", "assistant"][(index - firstUser) % 2];
        if (message?.role !== role) return `Message ${index + 1} should be of the role ${role}.`;
        if (typeof message.content !== "string") return `Message ${index + 1} has no text.`;
        if (!message.content.isWellFormed()) return `Message ${index + 1} is not valid Unicode.`;
    }
    return "";
};

const turnsOf = (messages, answers) => {
    const turns = [];
    for (let index = 0; index < messages.length; index += 2) {
        const text = messages[index + 1]?.content, end = answers?.[index / 2];
        const turn = {...newTurn(messages[index].content), text: text ?? ""};
        turn.finish_reason = text === undefined ? "cancelled" : "stop";
        if (Object.hasOwn(ENDINGS, end?.finish_reason ?? "")) {
            turn.finish_reason = end.finish_reason;
            turn.error = end.error ? String(end.error) : null;
        }
        turns.push(turn);
    }
    return turns;
};
