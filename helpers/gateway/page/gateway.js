// Requests to the gateway that this page came from. All paths are relative: it may be mounted under a prefix.

import {eventsOf} from "./stream.js";

// A failure that the user reads as a sentence. `status` is the HTTP status, if there is one.
export class GatewayError extends Error {
    constructor(message, status = 0) {
        super(message);
        this.status = status;
    }
}

// Return the model: its `id` and its `context_length`.
export const loadModel = async (key, signal) => {
    const response = await send("v1/models", {signal}, key);
    try {
        return (await response.json()).data[0];
    } catch {
        throw new GatewayError("The reply is not the gateway's. Reload the page.");
    }
};

// Yield the chunks of a streamed answer. Throw a GatewayError if the answer fails, and an AbortError after `signal`.
export async function* streamChat(fields, key, signal) {
    const body = JSON.stringify({...fields, stream: true, stream_options: {include_usage: true}});
    const headers = {"Content-Type": "application/json"};
    const response = await send("v1/chat/completions", {method: "POST", body, headers, signal}, key);
    try {
        for await (const data of eventsOf(response.body)) {
            if (data === "[DONE]") return;
            const chunk = JSON.parse(data);
            if (chunk.error) throw new GatewayError(chunk.error.message);
            yield chunk;
        }
    } catch (error) {
        if (error instanceof GatewayError || signal.aborted) throw error;
        throw new GatewayError("The connection to the gateway broke off. Ask again.");
    }
    throw new GatewayError("The answer broke off. Ask again.");
}

const send = async (path, options, key) => {
    const headers = {...options.headers, ...(key && {Authorization: `Bearer ${key}`})};
    let response;
    try {
        response = await fetch(path, {...options, headers, cache: "no-store"});
    } catch (error) {
        if (options.signal?.aborted) throw error;
        throw new GatewayError("The gateway does not answer. Check that it runs, and ask again.");
    }
    if (response.ok) return response;
    throw new GatewayError(await sentenceOf(response), response.status);
};

const sentenceOf = async response => {
    try {
        return String((await response.json()).error.message);
    } catch { // a proxy's answer
        return `The request failed with status ${response.status}. Ask again later.`;
    }
};
